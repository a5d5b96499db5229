"""Recordings become checkpoints: flow matching in stages, on one machine or several GPUs.

Import from the modules: `command` for the command line, `trainer.train` from Python.
"""
