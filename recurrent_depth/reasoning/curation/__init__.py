"""`recurrent-depth curate`: from a large pool of questions to a small set."""
