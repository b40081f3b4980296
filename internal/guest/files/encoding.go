package files

import (
	"compress/flate"
	"compress/gzip"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"

	"connectrpc.com/connect"
)

// wantsGzip negotiates the encoding of a download. gzip is used when it is
// asked for and not liked less than the plain bytes; when neither will do the
// answer is 406. A range is of the plain bytes, so gzip then waits.
func wantsGzip(h http.Header) (bool, error) {
	values := h.Values("Accept-Encoding")
	gz, identity, star := -1.0, -1.0, -1.0
	for _, v := range values {
		for item := range strings.SplitSeq(v, ",") {
			name, q := quality(item)
			switch name {
			case "gzip", "x-gzip":
				gz = q
			case "identity":
				identity = q
			case "*":
				star = q
			}
		}
	}
	plain := identity != 0 && (identity > 0 || star != 0)
	zipped := gz > 0 || gz < 0 && star > 0
	switch {
	case !plain && !zipped:
		return false, problemf(connect.CodeInvalidArgument, http.StatusNotAcceptable,
			"no acceptable encoding found: gzip and identity are supported")
	case !plain:
		return true, nil
	case h.Get("Range") != "":
		return false, nil
	}
	return gz > 0 && gz > identity, nil
}

// quality splits "gzip;q=0.5". What does not parse counts as 1.
func quality(item string) (name string, q float64) {
	name, params, _ := strings.Cut(item, ";")
	q = 1
	for p := range strings.SplitSeq(params, ";") {
		k, v, ok := strings.Cut(p, "=")
		if !ok || !strings.EqualFold(strings.TrimSpace(k), "q") {
			continue
		}
		if f, err := strconv.ParseFloat(strings.TrimSpace(v), 64); err == nil && f >= 0 && f <= 1 {
			q = f
		}
	}
	return strings.ToLower(strings.TrimSpace(name)), q
}

// A flate writer is most of a megabyte: they are kept.
var zippers = sync.Pool{New: func() any {
	z, _ := gzip.NewWriterLevel(nil, gzip.BestSpeed) // the level is valid
	return z
}}

// decoded is the body without its Content-Encoding, of which gzip is known.
func decoded(r *http.Request) (io.Reader, error) {
	name, _ := quality(r.Header.Get("Content-Encoding"))
	switch name {
	case "", "identity":
		return r.Body, nil
	case "gzip", "x-gzip":
		z, err := gzip.NewReader(r.Body)
		if err != nil {
			return nil, invalidf("the body is not gzip: %v", err)
		}
		return &gunzip{z}, nil
	}
	return nil, invalidf("unsupported Content-Encoding %.32q: gzip is supported", name)
}

// gunzip says that damage in the data is the caller's fault.
type gunzip struct{ z *gzip.Reader }

func (g *gunzip) Read(b []byte) (int, error) {
	n, err := g.z.Read(b)
	_, corrupt := errors.AsType[flate.CorruptInputError](err)
	if corrupt || errors.Is(err, gzip.ErrChecksum) || errors.Is(err, gzip.ErrHeader) {
		err = invalidf("the gzip body is damaged: %v", err)
	}
	return n, err
}
