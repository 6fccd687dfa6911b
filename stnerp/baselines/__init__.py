"""Other ways to answer the same question, one file per method."""
