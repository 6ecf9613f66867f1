"""The engines of `make_pairs.py`: each makes positive pairs in its own way, or hard negatives for pairs.

None loads torch or a model before it needs it. An engine is a function from the arguments of the command line to the pairs.
"""
