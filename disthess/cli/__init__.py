"""The command line: one function a verb, tables for people, JSON for scripts."""
