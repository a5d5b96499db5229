from ros_domain_setup import own_cache, ros

__all__ = ["own_cache", "ros"]
