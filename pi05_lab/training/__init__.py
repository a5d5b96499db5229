"""Training and fine-tuning: flow matching in stages, in one process or several.

`train.train` runs a training, `command` is its command line.
"""
