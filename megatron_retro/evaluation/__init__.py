"""What retrieval is worth: losses, leakage, answers to questions, and the report."""
