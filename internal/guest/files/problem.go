package files

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"strings"
	"unicode/utf8"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/guest/users"
)

// A problem is a failure that the caller reads: the same table gives it a
// Connect code and an HTTP status.
type problem struct {
	code   connect.Code
	status int
	msg    string
}

func (p *problem) Error() string { return p.msg }

func problemf(code connect.Code, status int, format string, args ...any) *problem {
	return &problem{code, status, fmt.Sprintf(format, args...)}
}

func invalidf(format string, args ...any) *problem {
	return problemf(connect.CodeInvalidArgument, http.StatusBadRequest, format, args...)
}

func unauthorizedf(format string, args ...any) *problem {
	return problemf(connect.CodeUnauthenticated, http.StatusUnauthorized, format, args...)
}

func absentf(format string, args ...any) *problem {
	return problemf(connect.CodeNotFound, http.StatusNotFound, format, args...)
}

// table says what the kernel's answers mean to a caller. The first match
// counts.
var table = []struct {
	err    error
	code   connect.Code
	status int
}{
	{fs.ErrNotExist, connect.CodeNotFound, http.StatusNotFound},
	{fs.ErrExist, connect.CodeAlreadyExists, http.StatusConflict},
	{unix.ENOTEMPTY, connect.CodeFailedPrecondition, http.StatusConflict},
	{unix.EROFS, connect.CodePermissionDenied, http.StatusForbidden},
	{fs.ErrPermission, connect.CodePermissionDenied, http.StatusForbidden},
	{unix.ENOSPC, connect.CodeResourceExhausted, http.StatusInsufficientStorage},
	{unix.EDQUOT, connect.CodeResourceExhausted, http.StatusInsufficientStorage},
	{unix.EFBIG, connect.CodeResourceExhausted, http.StatusInsufficientStorage},
	{unix.EMFILE, connect.CodeResourceExhausted, http.StatusServiceUnavailable},
	{unix.ENFILE, connect.CodeResourceExhausted, http.StatusServiceUnavailable},
	{unix.ENOTDIR, connect.CodeInvalidArgument, http.StatusBadRequest},
	{unix.EISDIR, connect.CodeInvalidArgument, http.StatusBadRequest},
	{unix.ENAMETOOLONG, connect.CodeInvalidArgument, http.StatusBadRequest},
	{unix.EINVAL, connect.CodeInvalidArgument, http.StatusBadRequest},
	{unix.EILSEQ, connect.CodeInvalidArgument, http.StatusBadRequest},
	{unix.ELOOP, connect.CodeFailedPrecondition, http.StatusBadRequest},
	{unix.EBUSY, connect.CodeFailedPrecondition, http.StatusConflict},
	{unix.ETXTBSY, connect.CodeFailedPrecondition, http.StatusConflict},
	{users.ErrUnknown, connect.CodeUnauthenticated, http.StatusUnauthorized},
}

// asProblem finds out what err means to a caller.
func asProblem(err error) *problem {
	if p, ok := errors.AsType[*problem](err); ok {
		return p
	}
	for _, row := range table {
		if errors.Is(err, row.err) {
			return &problem{row.code, row.status, message(err)}
		}
	}
	return &problem{connect.CodeInternal, http.StatusInternalServerError, message(err)}
}

// message is err in the words of this API: a path that is not there is said
// the way clients know it.
func message(err error) string {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Sprintf("path '%s' does not exist", pe.Path)
		}
		if errors.Is(err, unix.ENOSPC) {
			return fmt.Sprintf("not enough disk space for '%s'", pe.Path)
		}
	}
	return valid(err.Error())
}

// absent also takes a path that leads through a file for one that does not
// exist: nothing is there.
func absent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR)
}

// asConnect is err for a Connect caller; ctx errors are left to the library.
func asConnect(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*connect.Error](err); ok {
		return err
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	p := asProblem(err)
	return connect.NewError(p.code, errors.New(valid(p.msg)))
}

// reply answers err as JSON. The log keeps what the caller is not to blame for,
// of which leaving is one.
func (s *Service) reply(w http.ResponseWriter, r *http.Request, err error) {
	p := asProblem(err)
	if p.status == http.StatusInternalServerError && r.Context().Err() == nil {
		s.opt.Log.Error("files request failed", "op", r.Method+" "+r.URL.Path, "err", err)
	}
	h := w.Header()
	for _, k := range []string{"Content-Disposition", "Content-Encoding", "Content-Length", "Last-Modified"} {
		h.Del(k)
	}
	answer(w, p.status, struct {
		Code    int    `json:"code"`
		Message string `json:"message"`
	}{p.status, valid(p.msg)})
}

func answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}

// valid makes a string that protobuf and JSON can carry: file names are bytes.
func valid(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

// pathError wraps an error of a bare system call.
func pathError(op, path string, err error) error {
	if err == nil {
		return nil
	}
	return &os.PathError{Op: op, Path: path, Err: err}
}
