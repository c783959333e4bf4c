"""Results that are found again: keys made of contents, claims on work, notes of what is finished."""
