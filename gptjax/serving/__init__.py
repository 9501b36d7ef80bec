"""A trained model that answers: chats, and an HTTP server. It knows nothing of training."""
