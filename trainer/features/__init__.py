"""Columns of a log that no role names: declared in the schema, encoded once, read by every backbone."""
