"""test_model.py is a script of the tutorial with a test's name: pytest must not collect it."""

collect_ignore = ["test_model.py"]
