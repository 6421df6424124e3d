#!/bin/sh
# Makes what a server and its workers need to know each other, by openssl, below the folder $1:
#
#   certificates.sh DIR SERVER_NAMES WORKER [WORKER ...]
#
#   DIR/authority/      ca.key, ca.crt: the local certificate authority; keep this from both
#   DIR/WORKER/         ca.crt, tls.crt, tls.key, token
#   DIR/server/         the same, its token for `topq status` there, and tokens: a line for each
#
# SERVER_NAMES is what workers call the server: "server,10.0.0.7"; localhost and 127.0.0.1, as which
# it asks after its own health, are there without. What is good stays as it is; certificates with
# less than 30 days to go are made anew, and a server that runs takes them up by itself.
set -eu
umask 077

if [ $# -lt 3 ]; then
    sed -n '2,12p' "$0" >&2
    exit 2
fi
dir=$1
names=$2,localhost,127.0.0.1
shift 2
authority=$dir/authority

good() {
    [ -s "$1/tls.crt" ] && [ -s "$1/tls.key" ] &&
        openssl verify -CAfile "$authority/ca.crt" "$1/tls.crt" >/dev/null 2>&1 &&
        openssl x509 -in "$1/tls.crt" -noout -checkend 2592000 >/dev/null &&
        [ "$(openssl x509 -in "$1/tls.crt" -noout -pubkey)" = "$(openssl pkey -in "$1/tls.key" -pubout)" ]
}

make_key() {
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2>/dev/null
}

make_authority() {
    mkdir -p "$authority"
    [ ! -s "$authority/ca.crt" ] || return 0
    echo "making a certificate authority in $authority" >&2
    make_key "$authority/ca.key"
    openssl req -x509 -new -key "$authority/ca.key" -days 3650 -subj "/CN=topq local authority" \
        -addext "basicConstraints=critical,CA:TRUE,pathlen:0" \
        -addext "keyUsage=critical,keyCertSign,cRLSign" -out "$authority/ca.crt.new"
    mv "$authority/ca.crt.new" "$authority/ca.crt"
}

# make_certificate FOLDER COMMON_NAME ALTERNATIVE_NAMES USAGE
make_certificate() {
    mkdir -p "$1"
    ! good "$1" || return 0
    echo "making a certificate for $2 in $1" >&2
    make_key "$1/tls.key.new"
    {
        echo "basicConstraints=critical,CA:FALSE"
        echo "keyUsage=critical,digitalSignature"
        echo "extendedKeyUsage=$4"
        echo "subjectAltName=$3"
    } >"$1/extensions"
    openssl req -new -key "$1/tls.key.new" -subj "/CN=$2" |
        openssl x509 -req -CA "$authority/ca.crt" -CAkey "$authority/ca.key" \
            -set_serial "0x$(openssl rand -hex 16)" -days 397 -sha256 \
            -extfile "$1/extensions" -out "$1/tls.crt.new" 2>/dev/null
    rm "$1/extensions"
    cp "$authority/ca.crt" "$1/ca.crt"
    mv "$1/tls.key.new" "$1/tls.key"
    mv "$1/tls.crt.new" "$1/tls.crt"
}

alternative_names() {
    echo "$1" | tr ',' '\n' | while read -r name; do
        case $name in
            *:* | [0-9]*.[0-9]*.[0-9]*.[0-9]*) echo "IP:$name" ;;
            *) echo "DNS:$name" ;;
        esac
    done | paste -s -d, -
}

make_authority
make_certificate "$dir/server" "topq server" "$(alternative_names "$names")" serverAuth,clientAuth
for worker in "$@"; do
    make_certificate "$dir/$worker" "$worker" "DNS:$worker" clientAuth
done
: >"$dir/server/tokens.new"
for who in server "$@"; do
    [ -s "$dir/$who/token" ] || openssl rand -hex 32 >"$dir/$who/token"
    echo "$who $(cat "$dir/$who/token")" >>"$dir/server/tokens.new"
done
if cmp -s "$dir/server/tokens.new" "$dir/server/tokens"; then
    rm "$dir/server/tokens.new"
else
    mv "$dir/server/tokens.new" "$dir/server/tokens"
fi
