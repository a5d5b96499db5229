"""Messages become observations: decoding, age and skew limits, faulty images. Free of ROS."""
