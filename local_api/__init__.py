"""A local server that speaks OpenAI's files, fine-tuning, models and chat completions API, and really trains.

Start it with `python -m local_api`. README.md in this folder holds the map of its modules.
"""
