"""What programs that speak other APIs send and expect: OpenAI's and that of the A1111 web
interface.
"""
