"""Who vouches for an artifact: keys in files, and statements signed with them."""
