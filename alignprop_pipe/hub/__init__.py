"""Publishing on the Hugging Face Hub: the folder that goes there, the model card, licences."""
