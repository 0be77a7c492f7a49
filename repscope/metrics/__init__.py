"""The pure wing: tensors in, tensors or frozen results out.

No file, model, plot or global is touched, and no device is chosen. Each family ends in
a plain dict of its one-number metrics; a new row there is all it takes to add one.
"""
