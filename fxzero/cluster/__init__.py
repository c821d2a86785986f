"""Which way to train a model on many devices: ways, what each takes, and which is best."""
