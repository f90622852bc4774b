"""Looking at a work dir: a page of its figures and chunks with their neighbors, and answers in the terminal."""
