"""What the loop of `train.py` is made of: pairs, the contrastive loss and its gradients, validation, checkpoints, monitoring.

Nothing here parses a command line or decides where a run is saved. `training.pair_data` needs neither torch nor a model.
"""
