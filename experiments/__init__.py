"""What is done to a model: subjects, edits, interventions, data. Imports torch, never ray or inspect."""
