"""Text generation from a run or a Hugging Face folder."""
