package fault

import "connectrpc.com/connect"

// OfCode reads the table backwards, for errors that carry a Connect code and
// nothing else: from package connect itself and from agents.
func OfCode(code connect.Code) Kind {
	switch code {
	case connect.CodeInvalidArgument, connect.CodeOutOfRange:
		return Invalid
	case connect.CodeNotFound:
		return NotFound
	case connect.CodeAlreadyExists:
		return NameTaken
	case connect.CodeFailedPrecondition, connect.CodeAborted:
		return WrongState
	case connect.CodeResourceExhausted:
		return Limit
	case connect.CodeUnavailable:
		return Unavailable
	case connect.CodeUnimplemented:
		return Unsupported
	case connect.CodeDeadlineExceeded:
		return Timeout
	case connect.CodePermissionDenied, connect.CodeUnauthenticated:
		return Unauthorized
	case connect.CodeCanceled:
		return Canceled
	}
	return Internal
}
