from ros_domain_setup import ros

__all__ = ["ros"]
