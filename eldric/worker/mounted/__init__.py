"""Model files on mounts that may hang: whatever may block is done in a child process, and has a deadline."""
