"""Chats with a trained model, and an HTTP server. Independent of training."""
