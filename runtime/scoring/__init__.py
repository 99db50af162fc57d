"""What a trained model, or its features, are worth: scores, classifiers on features, fine-tuning."""
