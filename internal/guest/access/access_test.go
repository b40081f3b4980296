package access

import (
	"encoding/base64"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"testing"
	"time"
)

func TestUser(t *testing.T) {
	basic := func(s string) string { return "Basic " + base64.StdEncoding.EncodeToString([]byte(s)) }
	tests := []struct {
		header, want string
		err          error
	}{
		{"", "", nil},
		{basic("user:"), "user", nil},
		{basic("root:ignored"), "root", nil},
		{basic(":"), "", nil},
		{"basic dXNlcjo=", "user", nil},
		{"Bearer abc", "", nil},
		{basic("user"), "", ErrBasic},
		{"Basic !!", "", ErrBasic},
		{"Basic", "", ErrBasic},
	}
	for _, tt := range tests {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("Authorization", tt.header)
		if got, err := User(r); got != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("%q: got %q, %v, want %q, %v", tt.header, got, err, tt.want, tt.err)
		}
	}
}

// The value was computed with sha256sum and base64.
func TestSignKnown(t *testing.T) {
	const want = "v1_oO3VOyxXH3pkX/nhqGaqe3v8d+8vNhbGG2sLjuGWsuo"
	if got := Sign("/home/user/a.txt", Read, "user", "secret", ""); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestCheckFile(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	sign := func(path, op, user, exp string) url.Values {
		q := url.Values{"path": {path}, "signature": {Sign(path, op, user, "secret", exp)}}
		if user != "" {
			q.Set("username", user)
		}
		if exp != "" {
			q.Set("signature_expiration", exp)
		}
		return q
	}
	at := func(d int64) string { return strconv.FormatInt(now.Unix()+d, 10) }
	with := func(q url.Values, k, v string) url.Values { q.Set(k, v); return q }
	tests := []struct {
		name   string
		query  url.Values
		header string
		err    error
	}{
		{"signed", sign("a", Read, "user", ""), "", nil},
		{"default user", sign("a", Read, "", ""), "", nil},
		{"padded", with(sign("a", Read, "", ""), "signature", Sign("a", Read, "", "secret", "")+"="), "", nil},
		{"not yet expired", sign("a", Read, "user", at(1)), "", nil},
		{"expires now", sign("a", Read, "user", at(0)), "", nil},
		{"expired", sign("a", Read, "user", at(-1)), "", ErrExpired},
		{"not a time", sign("a", Read, "user", "soon"), "", ErrBadSign},
		{"for writing", sign("a", Write, "user", ""), "", ErrBadSign},
		{"another path", with(sign("a", Read, "user", ""), "path", "b"), "", ErrBadSign},
		{"another user", with(sign("a", Read, "user", ""), "username", "root"), "", ErrBadSign},
		{"expiration added", with(sign("a", Read, "user", ""), "signature_expiration", at(9)), "", ErrBadSign},
		{"none", url.Values{"path": {"a"}}, "", ErrNoSign},
		{"empty", url.Values{"path": {"a"}, "signature": {"="}}, "", ErrNoSign},
		{"token", nil, "secret", nil},
		{"wrong token", sign("a", Read, "user", ""), "secre", ErrWrongToken},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := httptest.NewRequest("GET", "/files", nil)
			if tt.header != "" {
				r.Header.Set(TokenHeader, tt.header)
			}
			if err := CheckFile(r, tt.query, Read, "secret", now); !errors.Is(err, tt.err) {
				t.Errorf("error %v, want %v", err, tt.err)
			}
			if err := CheckFile(r, tt.query, Read, "", now); err != nil {
				t.Errorf("without a token in the workspace: %v", err)
			}
		})
	}
}

func TestCheckToken(t *testing.T) {
	for _, tt := range []struct {
		got, want string
		err       error
	}{{"", "", nil}, {"x", "", nil}, {"a", "a", nil}, {"", "a", ErrToken}, {"b", "a", ErrToken}} {
		r := &http.Request{Header: http.Header{TokenHeader: {tt.got}}}
		if err := CheckToken(r, tt.want); !errors.Is(err, tt.err) {
			t.Errorf("%+v: error %v", tt, err)
		}
	}
}

func FuzzCheckFile(f *testing.F) {
	f.Add("path=a&signature=v1_x&signature_expiration=99", "Basic Og==")
	f.Add("signature===&path=%00", "Basic ////")
	f.Fuzz(func(t *testing.T, query, auth string) {
		q, _ := url.ParseQuery(query)
		r := &http.Request{Header: http.Header{"Authorization": {auth}}}
		// Nobody can guess a digest of this token.
		if err := CheckFile(r, q, Read, "0c2b8a4d-5a3e", time.Now()); err == nil {
			t.Errorf("%q was admitted", query)
		}
		_, _ = User(r)
	})
}
