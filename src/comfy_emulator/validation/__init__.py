"""Which prompts are accepted, and the errors of the others (`validate_prompt`, `validate_inputs` of `execution.py`)."""
