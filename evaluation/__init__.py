"""What evaluate.py is made of: which tasks, the rows of the table, their scores."""
