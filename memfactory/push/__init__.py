"""A trained model as a folder for the Hugging Face Hub: which files, with which card."""
