"""Other tools' YAML files into ours: a table of keys for each tool, and what could not be carried."""
