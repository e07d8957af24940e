"""One Ray Train worker: restore, stream, train, evaluate, save."""
