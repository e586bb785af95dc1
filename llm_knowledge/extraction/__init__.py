"""The job that reads all prompts of a dataset with a frozen model, in one process or many."""
