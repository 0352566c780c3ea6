"""Tables in Markdown, made from the JSON of benchmarks."""
