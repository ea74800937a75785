"""Each kind of result as a story, or as parts of one: the words and tables that writers write."""
