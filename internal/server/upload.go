package server

import (
	"context"
	"io"
	"net/http"
	"time"
)

// upload is a request's body whose reads end with the call's context: a client
// that sends nothing more must not hold up the daemon's shutdown.
type upload struct {
	r   *http.Request
	end func() bool
}

// newUpload prepares r's body for reading, and for an answer before its end.
// The caller closes it before it returns.
func newUpload(w http.ResponseWriter, r *http.Request) *upload {
	rc := http.NewResponseController(w)
	// Without it HTTP/1.1 would read on before an error could be written.
	_ = rc.EnableFullDuplex()
	return &upload{r: r, end: context.AfterFunc(r.Context(), func() {
		_ = rc.SetReadDeadline(time.Unix(1, 0)) // one that has passed ends a Read under way
	})}
}

func (u *upload) Read(p []byte) (int, error) {
	n, err := u.r.Body.Read(p)
	if err != nil && err != io.EOF && u.r.Context().Err() != nil { //nolint:errorlint // io.Reader's contract
		err = context.Cause(u.r.Context())
	}
	return n, err
}

// Close leaves the connection as it is for the next request.
func (u *upload) Close() error {
	u.end()
	return nil
}
