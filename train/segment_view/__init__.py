"""Shows one segment: its pictures, its sound, the gates that sound makes, and what runs predict of it."""
