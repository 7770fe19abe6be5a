"""The folder that stands in a captured program's PYTHONPATH, for its sitecustomize.py; nothing to import."""
