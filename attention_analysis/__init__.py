"""What `attention.py` is made of: which tokens there are, the shares that the last token's attention gives them, and the files of both."""
