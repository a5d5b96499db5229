"""The small policy: tokenizer, initialisation and auxiliary losses, a plug-in of the trainer."""
