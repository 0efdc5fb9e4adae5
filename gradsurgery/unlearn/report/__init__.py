"""What people read of a run: tables, pictures, verdict, page and model card."""
