"""A simulated ALOHA: two ViperX 300s arms, a table, cubes and cameras."""
