"""One policy for many robots, over openpi's websocket protocol."""
