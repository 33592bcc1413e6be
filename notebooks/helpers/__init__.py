"""The module that all notebooks share; see README.md beside this file."""
