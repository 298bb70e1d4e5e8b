"""From stored bytes to records, from records to figures, and whether these mean anything."""
