"""Writers of results: a terminal, an HTML page, Markdown, CSV; JSON is `Story.to_json`."""
