"""Callbacks and sinks for what people train with and look at.

Each file names one package and needs it: ``lightning``, ``transformers``,
``tensorboard``, ``wandb``. Nothing is imported here.
"""
