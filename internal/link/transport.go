package link

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"

	"github.com/agentiso/agentiso/internal/fault"
)

const (
	// maxHeader is the most that an answer's header may be, in bytes; the
	// agent's largest, a file's metadata, is under 8 KiB.
	maxHeader = 64 << 10
	// bodyBuffer is what a request body is collected in before it is sent.
	bodyBuffer = 32 << 10
)

// streamKey is the context key of the stream that a request goes over.
type streamKey struct{}

// newTransport returns the HTTP client behind all links: each request brings
// its stream along and has it to itself.
func newTransport() *http.Transport {
	return &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			st, ok := ctx.Value(streamKey{}).(*stream)
			if !ok {
				return nil, errors.New("request without a stream")
			}
			return st, nil
		},
		// A stream is as cheap as a request on an old one, and a fresh one is
		// never found dead, so that nothing is ever sent a second time.
		DisableKeepAlives: true,
		// A guest's gzip must not be unpacked unasked, without a limit.
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxHeader,
		WriteBufferSize:        bodyBuffer,
	}
}

// transport carries HTTP to the agent of id.
type transport struct {
	h  *Hub
	id string
}

func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	st, err := t.prepare(req)
	if err != nil {
		if req.Body != nil {
			req.Body.Close()
		}
		return nil, err
	}
	ctx := req.Context()
	resp, err := t.h.http.RoundTrip(req.WithContext(context.WithValue(ctx, streamKey{}, st)))
	if err != nil {
		err = t.explain(ctx, st, err)
		_ = st.Close() // in case the transport never got to it
		return nil, err
	}
	resp.Request = req
	return resp, nil
}

func (t *transport) prepare(req *http.Request) (*stream, error) {
	if req.URL == nil || req.URL.Scheme != "http" {
		return nil, fmt.Errorf("send request to agent %s: want an http:// URL, got %v", t.id, req.URL)
	}
	l, err := t.h.link(t.id)
	if err != nil {
		return nil, err
	}
	return l.open(req.Context())
}

// explain finds the reason behind what net/http made of an error.
func (t *transport) explain(ctx context.Context, st *stream, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if f, ok := errors.AsType[*fault.Error](err); ok {
		return f
	}
	if st.s.ended() {
		return st.s.reason()
	}
	return errResponse(t.id, err)
}
