"""What every script needs around its own work: messages to the user, reading and writing files, docstrings of installed packages.

Nothing here imports torch, and nothing here knows what the texts are for.
"""
