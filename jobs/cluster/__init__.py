"""What the commands for clusters share: the job server, uploads, checks, measurements."""
