// Package access reads and checks what callers show of themselves: the user
// name in the Authorization header, the workspace's access token, and
// signatures of single file operations. The forms are wire facts of existing
// sandbox SDK clients.
//
// It decides nothing about files and does not know which users exist.
package access

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// TokenHeader carries the access token of a workspace that was created secure.
const TokenHeader = "X-Access-Token"

// The operations that a signature is for.
const (
	Read  = "read"
	Write = "write"
)

// Why a call is refused. The messages of signatures are what clients compare.
var (
	ErrBasic      = errors.New("the Authorization header names no user")
	ErrToken      = errors.New("the access token is missing or wrong")
	ErrWrongToken = errors.New("access token present in header but does not match")
	ErrNoSign     = errors.New("missing signature query parameter")
	ErrBadSign    = errors.New("invalid signature")
	ErrExpired    = errors.New("signature is already expired")
)

// User is the user name of a request's Basic authorization, "" when there is
// none. The password is not looked at. Other schemes are somebody else's and
// count as none.
func User(r *http.Request) (string, error) {
	scheme, cred, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Basic") {
		return "", nil
	}
	b, err := base64.StdEncoding.DecodeString(strings.TrimSpace(cred))
	if err != nil {
		return "", ErrBasic
	}
	name, _, ok := strings.Cut(string(b), ":")
	if !ok {
		return "", ErrBasic
	}
	return name, nil
}

// CheckToken is nil if the request shows token, or if there is none to show.
func CheckToken(r *http.Request, token string) error {
	if token == "" || same(r.Header.Get(TokenHeader), token) {
		return nil
	}
	return ErrToken
}

// CheckFile is nil if the request shows token or a valid signature for op in
// its query, or if there is no token. A wrong token is not made good by a
// signature.
func CheckFile(r *http.Request, query url.Values, op, token string, now time.Time) error {
	if token == "" {
		return nil
	}
	if got := r.Header.Get(TokenHeader); got != "" {
		if same(got, token) {
			return nil
		}
		return ErrWrongToken
	}
	return checkSignature(query, op, token, now)
}

func checkSignature(query url.Values, op, token string, now time.Time) error {
	// Clients do not pad; one that does means the same.
	got := strings.TrimRight(query.Get("signature"), "=")
	if got == "" {
		return ErrNoSign
	}
	expiration := query.Get("signature_expiration")
	if !same(got, Sign(query.Get("path"), op, query.Get("username"), token, expiration)) {
		return ErrBadSign
	}
	if expiration == "" {
		return nil
	}
	until, err := strconv.ParseInt(expiration, 10, 64)
	if err != nil {
		return ErrBadSign
	}
	if until < now.Unix() {
		return ErrExpired
	}
	return nil
}

// Sign is the signature of an operation on a file: path and user as they stand
// in the query, expiration in Unix seconds or "" for none.
func Sign(path, op, user, token, expiration string) string {
	text := path + ":" + op + ":" + user + ":" + token
	if expiration != "" {
		text += ":" + expiration
	}
	sum := sha256.Sum256([]byte(text))
	return "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// same compares digests, so that neither content nor length of the secret shows
// in the time it takes.
func same(got, want string) bool {
	g, w := sha256.Sum256([]byte(got)), sha256.Sum256([]byte(want))
	return subtle.ConstantTimeCompare(g[:], w[:]) == 1
}
